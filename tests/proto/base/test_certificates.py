"""Ends of certificates, compared with what a library of X.509 reads."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509

from expertd.proto.base.certificates import first_end
from tests.support.certificates import DAY, Authority


@pytest.mark.parametrize("days", [-1, 1, 20 * 366, 40 * 366], ids=["ended", "tomorrow", "before 2050", "after 2050"])
def test_the_end_is_what_the_certificate_says(tmp_path: Path, days: int) -> None:
    path, _ = Authority(tmp_path).issue("one", lasts=days * DAY)
    expected = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    assert first_end(path.read_bytes()) == expected.timestamp()


def test_of_a_chain_or_bundle_the_first_end_counts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = [authority.issue(f"n{days}", lasts=days * DAY)[0] for days in (9, 3, 6)]
    bundle = b"Some words before\n" + b"".join(path.read_bytes() for path in files)
    assert first_end(bundle) == first_end(files[1].read_bytes())
    assert abs(first_end(bundle) - (datetime.datetime.now().timestamp() + 3 * DAY.total_seconds())) < 60


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    _, key = Authority(tmp_path).issue("one")
    broken = b"-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n"
    for pem in (b"", key.read_bytes(), broken):
        with pytest.raises(ValueError, match=r"empty|no certificate"):
            first_end(pem)
