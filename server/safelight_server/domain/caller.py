"""Who sends a request: a named caller of a tenant."""

from __future__ import annotations

from dataclasses import dataclass

from safelight_server.domain.errors import AdminOnlyError

NAME = r"^[A-Za-z0-9._-]{1,64}$"
"""What names of callers and tenants match."""
NAME_IN_WORDS = "1 to 64 letters, digits, dots, dashes and underscores"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. Callers of one tenant share its generations; to other tenants these do not exist."""

    name: str
    tenant: str
    is_admin: bool = False

    def check_admin(self) -> None:
        """Refuses callers that are not administrators.

        Raises:
            AdminOnlyError: the caller is not an administrator.
        """
        if not self.is_admin:
            raise AdminOnlyError("this call needs an administrator's key or token")
