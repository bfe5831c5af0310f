"""Use the package as it is installed, by the code of the README: `make package` runs this where nothing else is."""

import re
from importlib.metadata import version
from pathlib import Path

import qaconv_triton
from qaconv_triton.kernels import config  # lies elsewhere in the source tree

README = Path(__file__).parents[1] / "README.md"

assert "site-packages" in qaconv_triton.__file__, qaconv_triton.__file__
assert Path(config.__file__).is_relative_to(Path(qaconv_triton.__file__).parent), config.__file__
assert version("qaconv-triton") == qaconv_triton.__version__
code = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
names: dict[str, object] = {}
exec("\n".join(code), names)
assert names["scores"].shape == (16, 16)
