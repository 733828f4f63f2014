"""What was found of jobs' versions before they were published."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column(
            "version_id",
            sa.Text,
            sa.ForeignKey("versions.id", name="fk_evaluations_version_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("report", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("evaluations")
