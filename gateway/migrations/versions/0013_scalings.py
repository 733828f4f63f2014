"""Which versions are others, scaled by a factor."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "scalings",
        sa.Column("adapter_id", sa.Text, sa.ForeignKey("adapters.id", name="fk_scalings_adapter_id"), primary_key=True),
        sa.Column("source", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("factor", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version_id", sa.Text, sa.ForeignKey("versions.id", name="fk_scalings_version_id"), nullable=False),
    )
    op.create_index("ix_scalings_version_id", "scalings", ["version_id"])


def downgrade() -> None:
    op.execute("UPDATE versions SET provenance = 'upload' WHERE provenance = 'scaled'")  # what 0012 can read
    op.drop_table("scalings")
