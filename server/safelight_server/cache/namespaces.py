"""Who shares what is cached: one space for each tenant, or for the tenants of a pool that the operator marked.

Invariant: nothing found in one space was put by a tenant of another. Names in
stores are HMACs, so that the same picture of two tenants has two names and a
name does not confirm a guess. Neighbours: `fingerprint`, `storage.keyring`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safelight_server.cache import fingerprint
from safelight_server.cache.fingerprint import IndexKind, SharingScope
from safelight_server.catalog.catalog import Pipeline
from safelight_server.domain.request import Spec
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.purge import EntryOwner

MAX_SPACES = 65_536


@dataclass(frozen=True, slots=True)
class Namespace:
    """Where a tenant's entries are.

    Attributes:
        name: unique; goes into no store.
        prefix: first part of its keys in stores.
        key: the secret of its names.
    """

    name: str
    prefix: str
    key: bytes

    def seed(self, what: str) -> int:
        """A seed for what must differ by space."""
        return fingerprint.derived_seed(self.key, what)


@dataclass(frozen=True, slots=True)
class CacheKeys:
    """What an output is called in its space.

    Attributes:
        exact: equal for outputs with equal pixels.
        comparable: equal for outputs that differ in prompt and seed at most.
    """

    namespace: Namespace
    exact: str
    comparable: str


class Namespaces:
    """The namespaces of all tenants.

    Args:
        pools: names of pools to the tenants that share each.

    Raises:
        ValueError: a tenant is in two pools.
    """

    def __init__(self, keyring: Keyring, pools: Mapping[str, Sequence[str]]) -> None:
        self._keyring = keyring
        self._secret = keyring.derive("fingerprints")
        self._pool_of: dict[str, str] = {}
        for pool, tenants in pools.items():
            for tenant in tenants:
                if tenant in self._pool_of:
                    raise ValueError(f"tenant {tenant} is in two pools: {self._pool_of[tenant]} and {pool}")
                self._pool_of[tenant] = pool
        self._namespaces: dict[str, Namespace] = {}

    def of(self, tenant: str) -> Namespace:
        """The space of a tenant."""
        pool = self._pool_of.get(tenant)
        name = _own(tenant) if pool is None else f"pool {pool}"
        namespace = self._namespaces.get(name)
        if namespace is None:
            if len(self._namespaces) >= MAX_SPACES:
                self._namespaces.clear()
            scope = SharingScope(tenant if pool is None else pool, pooled=pool is not None)
            key = fingerprint.tenant_key(self._secret, scope)
            namespace = self._namespaces[name] = Namespace(name, self._keyring.tenant(name), key)
        return namespace

    def prefixes(self, tenant: str) -> list[str]:
        """The beginnings of all keys in stores under which there may be something of a tenant.

        What it shares with a pool cannot be told from the others'; what it had before it was in one is its own.
        """
        return list(
            dict.fromkeys(f"{prefix}/" for prefix in (self._keyring.tenant(_own(tenant)), self.of(tenant).prefix))
        )

    def owner(self, namespace: Namespace, revision: str, generation: str) -> EntryOwner:
        """Whose an entry is, by the names of its model revision and generation."""
        keyring = self._keyring
        return EntryOwner(
            f"{namespace.prefix}/", keyring.tag("revision", revision), keyring.tag("generation", generation)
        )

    def output(self, tenant: str, pipeline: Pipeline, numerics_id: str, spec: Spec, seed: int) -> CacheKeys:
        """The names of an output."""
        namespace = self.of(tenant)
        exact = fingerprint.exact(pipeline.digest, numerics_id, spec, seed)
        comparable = fingerprint.compatible(pipeline.digest, numerics_id, spec)
        return CacheKeys(
            namespace,
            fingerprint.index_key(namespace.key, IndexKind.EXACT, exact),
            fingerprint.index_key(namespace.key, IndexKind.COMPATIBLE, comparable),
        )

    def private(self, generation: str, output_index: int) -> str:
        """The name of one output that shares nothing: 64 hexadecimal digits."""
        return self._keyring.digest("output", generation, str(output_index))


def _own(tenant: str) -> str:
    return f"tenant {tenant}"
