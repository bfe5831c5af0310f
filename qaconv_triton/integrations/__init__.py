"""The library inside other packages; each module needs its package, an extra of this one."""
