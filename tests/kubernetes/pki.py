"""The certificates and keys of a test cluster."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()
API_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")
API_ADDRESSES = ("10.99.0.1", "10.96.0.1", "127.0.0.1")


class Authority:
    """Signs the certificates of one cluster, for a day."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign("authority", self._key, x509.BasicConstraints(ca=True, path_length=None))

    def write(self, folder: Path) -> None:
        """Writes what the parts of the cluster need: ca, api, client (the API to kubelets), accounts (tokens)."""
        (folder / "ca.crt").write_bytes(self._certificate.public_bytes(PEM))
        (folder / "ca.key").write_bytes(self._key.private_bytes(PEM, PKCS8, PLAIN))
        names = [x509.DNSName(name) for name in API_NAMES]
        addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in API_ADDRESSES]
        for name, extension in (
            ("api", x509.SubjectAlternativeName([*names, *addresses])),
            ("client", x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH])),
        ):
            key = ec.generate_private_key(ec.SECP256R1())
            (folder / f"{name}.crt").write_bytes(self._sign(f"system:{name}", key, extension).public_bytes(PEM))
            (folder / f"{name}.key").write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))
        accounts = ec.generate_private_key(ec.SECP256R1())
        (folder / "accounts.key").write_bytes(accounts.private_bytes(PEM, PKCS8, PLAIN))
        public = accounts.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / "accounts.pub").write_bytes(public)

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        subject = x509.Name([
            x509.NameAttribute(x509.NameOID.COMMON_NAME, name),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "system:masters"),
        ])  # fmt: skip
        builder = x509.CertificateBuilder().issuer_name(issuer)
        builder = builder.subject_name(issuer if name == "authority" else subject).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        return builder.add_extension(extension, critical=False).sign(self._key, hashes.SHA256())
