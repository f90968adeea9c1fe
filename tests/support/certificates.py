"""Self-signed certificates, for tests of TLS."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NAME = "safelight.example"


def new_pair(name: str = NAME, days: int = 1) -> tuple[bytes, bytes]:
    """Makes a certificate of this name that is valid for `days`, and its key, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().issuer_name(subject).subject_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=days))
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    cert = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    plain, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_pem = key.private_bytes(serialization.Encoding.PEM, plain, no_password)
    return cert.public_bytes(serialization.Encoding.PEM), key_pem


def self_signed(folder: Path, name: str = NAME) -> tuple[Path, Path]:
    """Writes a certificate of this name and its key into `folder`; returns their paths."""
    files = folder / f"{name}.pem", folder / f"{name}.key"
    for file, pem in zip(files, new_pair(name), strict=True):
        file.write_bytes(pem)
    return files
