"""When each blob was last read and compared with its digest, and what was wrong with it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blob_checks",
        sa.Column("tenant_id", sa.Text, primary_key=True),
        sa.Column("sha256", sa.Text, primary_key=True),
        sa.Column("checked_at", sa.BigInteger, nullable=False),
        sa.Column("fault", sa.Text),
    )
    op.create_index("ix_blob_checks_fault", "blob_checks", ["fault"])


def downgrade() -> None:
    op.drop_table("blob_checks")
