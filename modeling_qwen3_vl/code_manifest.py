"""Which files a Hub copy of this code consists of; empty in the installed package.

`hub_export` writes the real one beside the files it copies. It is a Python module and not JSON because the Hub
loader carries along Python modules only, and only those that the text of another one imports: the generated file
names all of them, so that a model loaded from a Hub copy finds its whole code beside itself and can save it again.
"""

PACKAGE_VERSION: str = ""
CODE_FILES: dict[str, str] = {}  # file name -> sha256
