"""The library inside other packages' training loops; each module needs its package, an extra of this one."""
