"""Add Debian's packages to a CycloneDX list of Python's.

sbom.py PYTHON.cdx.json DEBIAN.txt > sbom.cdx.json
"""

import json
import sys
from pathlib import Path


def add_debian(bom: dict, packages: str) -> dict:
    """The list with a component for every line `name version architecture` of `packages`."""
    for line in packages.splitlines():
        name, version, architecture = line.split()
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        bom["components"].append({"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl})
    return bom


if __name__ == "__main__":
    print(json.dumps(add_debian(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).read_text()), indent=1))
