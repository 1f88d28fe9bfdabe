"""Reads what protects the public ports: clients' keys, the gRPC ports' certificate. Part of the shell."""

from __future__ import annotations

from headrace.errors import ConfigError
from headrace.home import expand_home
from services.router.api_keys import ApiKeys, parse_keys
from services.router.config import Settings
from services.router.grpc.server import Security, credentials_of


def load_security(settings: Settings) -> Security:
    """Keys and certificate, as the settings name them.

    Raises:
        ConfigError: A file cannot be read or holds none, or one of a pair is missing; it names the setting.
    """
    keys = ApiKeys()
    if settings.api_keys_file:
        text = _read(settings.api_keys_file, "router.api_keys_file").decode(errors="replace")
        keys = ApiKeys(parse_keys(text, f"router.api_keys_file {settings.api_keys_file}"))
    cert, key, client_ca = settings.grpc_tls_cert, settings.grpc_tls_key, settings.grpc_tls_client_ca
    if not cert and not key and not client_ca:
        return Security(keys)
    if not cert or not key:
        missing = "router.grpc_tls_key" if cert else "router.grpc_tls_cert"
        raise ConfigError(f"{missing} must be set: TLS needs a certificate and its private key")
    authorities = _read_pem(client_ca, "router.grpc_tls_client_ca") if client_ca else None
    pair = (_read_pem(cert, "router.grpc_tls_cert"), _read_pem(key, "router.grpc_tls_key"))
    return Security(keys, credentials_of(*pair, authorities))


def _read_pem(path: str, setting: str) -> bytes:
    content = _read(path, setting)
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{setting}: {path} is no PEM file")
    return content


def _read(path: str, setting: str) -> bytes:
    try:
        return expand_home(path, setting).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}") from error
