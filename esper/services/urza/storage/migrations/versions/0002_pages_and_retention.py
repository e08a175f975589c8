"""Indexes for pages of lists, and since when a kernel is retired.

Revision 0002, after 0001.
"""

import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_blueprints_submitted_at", "blueprints", ["submitted_at", "id"])
    op.create_index("ix_kernels_created_at", "kernels", ["created_at", "id"])
    op.add_column("kernels", sa.Column("retired_at", sa.Float()))
    # nobody noted when: their time begins here, so that none is removed too early
    since = sa.text("UPDATE kernels SET retired_at = :now WHERE status = 'retired'").bindparams(now=time.time())
    op.execute(since)


def downgrade() -> None:
    op.drop_column("kernels", "retired_at")
    op.drop_index("ix_kernels_created_at", "kernels")
    op.drop_index("ix_blueprints_submitted_at", "blueprints")
