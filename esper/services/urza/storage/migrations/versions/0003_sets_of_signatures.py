"""A kernel has a signature of each key that signed it, and an attachment of each for a target.

Revision 0003, after 0002.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ATTACHMENT = "artifact_id, target_key, document, size_bytes, created_at"


def upgrade() -> None:
    signatures = op.create_table(
        "signatures",
        sa.Column("artifact_id", sa.String(64), sa.ForeignKey("kernels.id"), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("fits", sa.Boolean(), nullable=False),
        sa.Column("added_by", sa.String(100), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    connection = op.get_bind()
    kept = connection.execute(sa.text("SELECT id, signature, created_at FROM kernels WHERE signature IS NOT NULL"))
    rows = [
        {
            "artifact_id": artifact_id,
            "key_id": json.loads(document)["key_id"],
            "document": document,
            "fits": False,
            "added_by": "",
            "created_at": created_at,
        }
        for artifact_id, document, created_at in kept
    ]
    if rows:
        op.bulk_insert(signatures, rows)
    op.drop_column("kernels", "signature")
    op.create_table(
        "signed_attachments",
        sa.Column("artifact_id", sa.String(64), sa.ForeignKey("kernels.id"), primary_key=True),
        sa.Column("target_key", sa.String(200), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("fits", sa.Boolean(), nullable=False),
        sa.Column("added_by", sa.String(100), nullable=False),
        sa.Column("document", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.execute(
        f"INSERT INTO signed_attachments ({_ATTACHMENT}, key_id, fits, added_by) "
        f"SELECT {_ATTACHMENT}, '', FALSE, '' FROM attachments"
    )
    op.drop_table("attachments")


def downgrade() -> None:
    """Of several signatures one stays, and of several attachments for a target."""
    op.create_table(
        "attachments",
        sa.Column("artifact_id", sa.String(64), sa.ForeignKey("kernels.id"), primary_key=True),
        sa.Column("target_key", sa.String(200), primary_key=True),
        sa.Column("document", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    one = "SELECT MAX(b.key_id) FROM signed_attachments b WHERE b.artifact_id = a.artifact_id"
    op.execute(
        f"INSERT INTO attachments ({_ATTACHMENT}) SELECT {_ATTACHMENT} FROM signed_attachments a "
        f"WHERE a.key_id = ({one} AND b.target_key = a.target_key)"
    )
    op.drop_table("signed_attachments")
    op.add_column("kernels", sa.Column("signature", sa.Text()))
    one = "SELECT MIN(key_id) FROM signatures WHERE artifact_id = kernels.id"
    op.execute(
        "UPDATE kernels SET signature = (SELECT document FROM signatures WHERE artifact_id = kernels.id "
        f"AND key_id = ({one}))"
    )
    op.drop_table("signatures")
