"""Size limits of artifacts and blueprints."""

from __future__ import annotations

from dataclasses import dataclass

from esper.artifacts.errors import ArtifactLimitError

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds, all checked before anything of the declared size is allocated.

    ``max_value_elements`` bounds every tensor and every intermediate value of a kernel, per leading position.
    """

    max_bytes: int = 2**29
    max_header_bytes: int = 2**22
    max_blueprint_bytes: int = 2**29
    max_nodes: int = 2048
    max_tensors: int = 1024
    max_rank: int = 8
    max_dimension: int = 2**20
    max_parameters: int = 2**26
    max_value_elements: int = 2**26

    def check_count(self, what: str, count: int, limit_name: str) -> None:
        """Raises :class:`ArtifactLimitError` if `count` exceeds the limit called `limit_name`."""
        limit: int = getattr(self, limit_name)
        if count > limit:
            raise ArtifactLimitError(
                f"{what} is {count}, but Limits.{limit_name} is {limit}; raise it if you trust this"
            )

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Bounds the number, ranks, dimensions and total size of declared tensors."""
        self.check_count("the number of tensors", len(shapes), "max_tensors")
        total = 0
        for name, shape in shapes.items():
            self.check_count(f"the rank of tensor {name!r}", len(shape), "max_rank")
            elements = 1
            for size in shape:
                self.check_count(f"a dimension of tensor {name!r}", size, "max_dimension")
                elements *= size
            self.check_count(f"the size of tensor {name!r}", elements, "max_value_elements")
            total += elements
        self.check_count("the total number of parameters", total, "max_parameters")
