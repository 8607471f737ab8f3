"""Which NICs to use, in the syntax of NCCL_IB_HCA: names that a cluster's operator has already chosen for its collectives."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class NicName:
    """One name of a list.

    Attributes:
        name: of a device, or what it begins with.
        port: None for all.
    """

    name: str
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NicFilter:
    """A list of NICs to use or to leave alone. Without names it takes all.

    Attributes:
        names: in the order given.
        exclude: take all but these.
        exact: names are whole, not beginnings: "mlx5_1" is not "mlx5_10".
        source: where it comes from, for messages.
    """

    names: tuple[NicName, ...] = ()
    exclude: bool = False
    exact: bool = False
    source: str = ""

    def takes(self, name: str, port: int) -> bool:
        """Whether to use a port of a device."""
        if not self.names:
            return True
        return any(self._fits(listed, name, port) for listed in self.names) != self.exclude

    def _fits(self, listed: NicName, name: str, port: int) -> bool:
        same = name == listed.name if self.exact else name.startswith(listed.name)
        return same and listed.port in (None, port)


def parse_nic_filter(text: str, *, source: str) -> NicFilter:
    """Read a list: `mlx5_0:1,mlx5_1`; `^` before it excludes, `=` makes names exact, together in either order.

    After NCCL's user guide, "NCCL_IB_HCA". An empty text takes all. Unlike there, blanks around names are ignored, and what
    cannot be meant (no names behind `^`, a port that is no number) is refused.

    Args:
        source: name of the option, for messages.

    Raises:
        ConfigError: names nothing, or a port that is no positive number.
    """
    listed = text.strip().lstrip("^=")
    prefix = text.strip()[: len(text.strip()) - len(listed)]
    names = tuple(_name(token.strip(), text, source) for token in listed.split(",") if token.strip())
    if prefix not in ("", "^", "=", "^=", "=^") or (prefix and not names):
        raise ConfigError(
            f"{source}={text!r}: expected names such as mlx5_0:1,mlx5_1 behind an optional ^ (not these) and = (exact names), "
            f"got {prefix!r} and {len(names)} names; unset it to use all NICs"
        )
    return NicFilter(names=names, exclude="^" in prefix, exact="=" in prefix, source=source)


def _name(token: str, text: str, source: str) -> NicName:
    name, colon, port = token.partition(":")
    if not name or (colon and not (port.isascii() and port.isdecimal() and int(port) > 0)):
        raise ConfigError(
            f"{source}={text!r}: expected NAME or NAME:PORT with a port from 1, got {token!r}; mend the list"
        )
    return NicName(name=name, port=int(port) if colon else None)
