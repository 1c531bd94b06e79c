"""What an image holds of Python, as CycloneDX in JSON: expertd and every package of a lock file.

    python requirements/sbom.py requirements/client.lock 0.1.0+g0123456789ab

Of the lock file alone, with the standard library alone: the same bits wherever it runs, also while images are built.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

PIN = re.compile(r"^([a-z0-9-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def component(kind: str, name: str, version: str) -> dict[str, Any]:
    """A package by the name that vulnerability databases know it under."""
    purl = f"pkg:pypi/{name}@{quote(version)}"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def packages(lock: str) -> list[dict[str, Any]]:
    """The components of a lock file; `hashes` are those of the files of which pip takes one.

    Raises ValueError for a lock file with anything but pins with hashes.
    """
    text = lock.replace("\\\n", " ").strip()
    pins = PIN.findall(text)
    if len(pins) != len(text.splitlines()):
        raise ValueError(f"the lock file has {len(text.splitlines())} lines and {len(pins)} pins with hashes")
    found = []
    for name, version, hashes in pins:
        digests = re.findall("[0-9a-f]{64}", hashes)
        found.append(
            component("library", name, version) | {"hashes": [{"alg": "SHA-256", "content": one} for one in digests]}
        )
    return found


def bill(lock: str, version: str) -> dict[str, Any]:
    """expertd of `version` with the packages of a lock file."""
    expertd = component("application", "expertd", version) | {"licenses": [{"license": {"id": "Apache-2.0"}}]}
    components = packages(lock)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": expertd},
        "components": components,
        "dependencies": [{"ref": expertd["bom-ref"], "dependsOn": [one["bom-ref"] for one in components]}],
    }


if __name__ == "__main__":
    print(json.dumps(bill(Path(sys.argv[1]).read_text(), sys.argv[2]), indent=1))
