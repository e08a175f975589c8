"""Urza's tables. Their history is in `migrations/versions`; a change here needs a migration there.

Times are seconds since 1970 UTC. Documents (blueprints, artifacts, attachments) lie in the blob store under the SHA-256
of their bytes; the tables hold what is searched for.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = ["AttachmentRow", "Base", "BlueprintRow", "KernelRow", "NameRow", "SignatureRow"]


class Base(DeclarativeBase):
    """Base class of the tables."""


class BlueprintRow(Base):
    """A submitted blueprint, and while it is being compiled, who may say how that ended."""

    __tablename__ = "blueprints"
    __table_args__ = (
        Index("ix_blueprints_status_submitted_at", "status", "submitted_at"),
        Index("ix_blueprints_submitted_at", "submitted_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    document: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    artifact_id: Mapped[str | None] = mapped_column(String(64))
    attempts: Mapped[int] = mapped_column(default=0)
    claim_token: Mapped[str | None] = mapped_column(String(32))
    lease_expires_at: Mapped[float | None] = mapped_column(Float)
    submitted_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)

    names: Mapped[list[NameRow]] = relationship(
        lazy="selectin", order_by="NameRow.created_at, NameRow.name", cascade="all, delete-orphan"
    )


class NameRow(Base):
    """A name that people gave to a blueprint, and so to its kernel."""

    __tablename__ = "names"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    blueprint_id: Mapped[str] = mapped_column(ForeignKey("blueprints.id"), index=True)
    created_at: Mapped[float] = mapped_column(Float)


class KernelRow(Base):
    """A validated kernel."""

    __tablename__ = "kernels"
    __table_args__ = (
        Index("ix_kernels_features", "in_features", "out_features"),
        Index("ix_kernels_created_at", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    blueprint_id: Mapped[str] = mapped_column(ForeignKey("blueprints.id"), index=True)
    status: Mapped[str] = mapped_column(String(16))
    in_features: Mapped[int]
    out_features: Mapped[int]
    dtype: Mapped[str] = mapped_column(String(16))
    uses_host: Mapped[bool]
    parameter_count: Mapped[int] = mapped_column(BigInteger)
    node_count: Mapped[int]
    graph_digest: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)
    latency_us: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float)
    retired_at: Mapped[float | None] = mapped_column(Float)

    blueprint: Mapped[BlueprintRow] = relationship(lazy="joined", innerjoin=True)
    signatures: Mapped[list[SignatureRow]] = relationship(
        lazy="selectin", order_by="SignatureRow.created_at, SignatureRow.key_id", cascade="all, delete-orphan"
    )
    attachments: Mapped[list[AttachmentRow]] = relationship(
        lazy="selectin",
        order_by="AttachmentRow.target_key, AttachmentRow.created_at, AttachmentRow.key_id",
        cascade="all, delete-orphan",
    )


class SignatureRow(Base):
    """What one key's holder signed a kernel with."""

    __tablename__ = "signatures"

    artifact_id: Mapped[str] = mapped_column(ForeignKey("kernels.id"), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    document: Mapped[str] = mapped_column(Text)
    """As `Signature.to_json` writes it."""
    fits: Mapped[bool]
    """Whether it came with the public key that it verifies by. Others may be forged, and give way to one that does."""
    added_by: Mapped[str] = mapped_column(String(100))
    """Name of the token; empty for who needs none."""
    created_at: Mapped[float] = mapped_column(Float)


class AttachmentRow(Base):
    """Compiled code of a kernel for one target, by one signer."""

    __tablename__ = "signed_attachments"

    artifact_id: Mapped[str] = mapped_column(ForeignKey("kernels.id"), primary_key=True)
    target_key: Mapped[str] = mapped_column(String(200), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The signer's; empty for one of before schema 0003, which did not note it."""
    fits: Mapped[bool]
    added_by: Mapped[str] = mapped_column(String(100))
    document: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Float)
