"""Cache namespaces: one for each tenant, or one for all tenants of a pool that the operator configured.

Invariant: a lookup in one namespace never finds an entry of another. Names in stores are HMACs (`fingerprint`), so two
tenants have different names for the same picture, and a name cannot be used to confirm a guessed prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from safelight_server.cache import fingerprint
from safelight_server.cache.fingerprint import IndexKind, SharingScope
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.request import Spec
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.purge import EntryOwner

MAX_SPACES = 65_536


@dataclass(frozen=True, slots=True)
class Namespace:
    """The namespace of a tenant or pool.

    Attributes:
        name: unique; in plain text, so never written to a store.
        prefix: first part of its store keys.
        key: the secret for its index keys and seeds.
    """

    name: str
    prefix: str
    key: bytes

    def seed(self, what: str) -> int:
        """Derives a secret seed, different for each namespace."""
        return fingerprint.derived_seed(self.key, what)


@dataclass(frozen=True, slots=True)
class CacheKeys:
    """The names of an output in its namespace.

    Attributes:
        exact: equal for outputs with equal fingerprints, and so equal pixels.
        make_comparable: makes `comparable`, which exact hits do not need.
    """

    namespace: Namespace
    exact: str
    make_comparable: Callable[[], str] = field(compare=False, repr=False)

    @property
    def comparable(self) -> str:
        """Equal for outputs that differ at most in prompt and seed."""
        return self.make_comparable()


class Namespaces:
    """The namespaces of all tenants.

    Args:
        pools: the tenants of each pool, by the pool's name.

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
        """Returns the namespace of a tenant."""
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

    def own_prefix(self, tenant: str) -> str:
        """Returns the first part of the store keys of what a tenant shares with no pool."""
        return self._keyring.tenant(_own(tenant))

    def prefixes(self, tenant: str) -> list[str]:
        """Returns the prefixes of all store keys that may belong to a tenant.

        For a tenant in a pool, these are its own prefix, from before it joined, and that of the whole pool, because
        entries in a pool do not say which tenant made them.
        """
        return list(dict.fromkeys(f"{prefix}/" for prefix in (self.own_prefix(tenant), self.of(tenant).prefix)))

    def owner(self, namespace: Namespace, revision: str, generation: str) -> EntryOwner:
        """Returns the owner of an entry, by the names of its model revision and generation."""
        keyring = self._keyring
        return EntryOwner(
            f"{namespace.prefix}/", keyring.tag("revision", revision), keyring.tag("generation", generation)
        )

    def output(self, tenant: str, pipeline: Pipeline, numerics_id: str, spec: Spec, seed: int) -> CacheKeys:
        """Returns the names of an output."""
        namespace = self.of(tenant)
        common = fingerprint.comparable(pipeline.digest, numerics_id, spec)
        exact = fingerprint.exact(common, spec.token_ids, seed)

        def comparable() -> str:
            return fingerprint.index_key(namespace.key, IndexKind.COMPATIBLE, fingerprint.compatible(common))

        return CacheKeys(namespace, fingerprint.index_key(namespace.key, IndexKind.EXACT, exact), comparable)

    def private(self, generation: str, output_index: int) -> str:
        """Returns a name for an output that shares nothing: 64 hexadecimal digits."""
        return self._keyring.digest("output", generation, str(output_index))


def _own(tenant: str) -> str:
    return f"tenant {tenant}"
