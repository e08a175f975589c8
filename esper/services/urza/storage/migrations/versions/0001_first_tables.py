"""The first tables.

Revision 0001, after nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blueprints",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("document", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("report", sa.JSON()),
        sa.Column("artifact_id", sa.String(64)),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("claim_token", sa.String(32)),
        sa.Column("lease_expires_at", sa.Float()),
        sa.Column("submitted_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_blueprints_status_submitted_at", "blueprints", ["status", "submitted_at"])
    op.create_table(
        "names",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("blueprint_id", sa.String(64), sa.ForeignKey("blueprints.id"), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_names_blueprint_id", "names", ["blueprint_id"])
    op.create_table(
        "kernels",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("blueprint_id", sa.String(64), sa.ForeignKey("blueprints.id"), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("in_features", sa.Integer(), nullable=False),
        sa.Column("out_features", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("uses_host", sa.Boolean(), nullable=False),
        sa.Column("parameter_count", sa.BigInteger(), nullable=False),
        sa.Column("node_count", sa.Integer(), nullable=False),
        sa.Column("graph_digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("signature", sa.Text()),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("latency_us", sa.Float()),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_kernels_blueprint_id", "kernels", ["blueprint_id"])
    op.create_index("ix_kernels_features", "kernels", ["in_features", "out_features"])
    op.create_index("ix_kernels_graph_digest", "kernels", ["graph_digest"])
    op.create_table(
        "attachments",
        sa.Column("artifact_id", sa.String(64), sa.ForeignKey("kernels.id"), primary_key=True),
        sa.Column("target_key", sa.String(200), primary_key=True),
        sa.Column("document", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("attachments")
    op.drop_table("kernels")
    op.drop_table("names")
    op.drop_table("blueprints")
