"""Who sends a request: a named caller of a tenant."""

from __future__ import annotations

from dataclasses import dataclass

from safelight_server.domain.errors import AdminOnlyError


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. What one tenant owns does not exist for another; callers of a tenant share what it owns."""

    name: str
    tenant: str
    is_admin: bool = False

    def check_admin(self) -> None:
        """Lets administrators pass.

        Raises:
            AdminOnlyError: this is none.
        """
        if not self.is_admin:
            raise AdminOnlyError("this call needs an administrator's key")
