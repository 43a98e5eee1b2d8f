"""Whether certificates are good now: their dates, whom they are for, and who vouches for them."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtensionOID

from scalefl.errors import ConfigError

WARN_AHEAD = datetime.timedelta(days=14)


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate ({error}): it is made by scalefl deploy init") from error


def out_of_date(certificate: x509.Certificate) -> str:
    """What is wrong with its dates now, as the end of a sentence about it; empty if nothing is."""
    now = _now()
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return f"expired on {_shown(end)} (now: {_shown(now)})"
    if now < begin:
        return f"is not yet valid, not until {_shown(begin)} (this machine's clock: {_shown(now)})"
    return ""


def ends_soon(certificate: x509.Certificate) -> str:
    """When it expires, as the end of a sentence about it; empty if that is more than `WARN_AHEAD` away."""
    end = certificate.not_valid_after_utc
    left = end - _now()
    if left > WARN_AHEAD:
        return ""
    return f"expires on {_shown(end)}, in {left.days} days"


def is_for(certificate: x509.Certificate, host: str) -> bool:
    """Whether it is for a name or an address."""
    first, _, rest = host.partition(".")
    return any(_same(name, host) or (first and _same(name, f"*.{rest}")) for name in names_of(certificate))


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that it is for."""
    try:
        found = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    assert isinstance(found, x509.SubjectAlternativeName)
    addresses = map(str, found.get_values_for_type(x509.IPAddress))
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def is_vouched_for(certificate: x509.Certificate, authorities: list[x509.Certificate]) -> bool:
    """Whether one of the authorities has signed it itself."""
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _same(name: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(host)
    except ValueError:
        return name.lower() == host.lower()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _shown(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
