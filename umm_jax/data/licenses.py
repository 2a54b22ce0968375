"""Which data a commercial run may read: every record names its licence, every folder counts them.

The list is of terms that plainly permit commercial use, by their SPDX names; whatever is not on it, an
empty name too, is refused rather than guessed at. It is no legal advice: several of these ask for attribution
or for sharing alike, and the rights to a picture are not always those of the list it stands in.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from umm_jax.errors import DataError

_COMMERCIAL = re.compile(
    r"CC0-1\.0|CC-BY(-SA)?-[1-4]\.\d|Apache-2\.0|MIT|BSD-[23]-Clause|0BSD|ISC|Unlicense"
    r"|ODC-By-1\.0|ODbL-1\.0|PDDL-1\.0|CDLA-Permissive-[12]\.0|CC-PDDC",
    re.IGNORECASE,
)


def commercial(license: str) -> bool:
    """Whether these terms, or all that are joined by AND, are known to permit commercial use."""
    return all(_COMMERCIAL.fullmatch(terms.strip()) for terms in license.split(" AND "))


def check_commercial(folder: str | Path, manifest: Mapping) -> None:
    """Raises DataError, naming terms and counts, where a folder holds records that may not be used so."""
    counts = manifest.get("counts", {}).get("licenses")
    if counts is None:
        raise DataError(
            f"{folder}: does not say the licences of its records (made by an earlier release); make it "
            "again, or set data.licenses=any"
        )
    refused = {name: count for name, count in counts.items() if not commercial(name)}
    if refused:
        named = ((name or "no licence that is named", count) for name, count in refused.items())
        said = ", ".join(f"{count} under {name}" for name, count in named)
        raise DataError(
            f"{folder}: holds records that data.licenses=commercial does not admit ({said}); leave this "
            "source out, import it again with --license where you have other terms, or set data.licenses=any"
        )
