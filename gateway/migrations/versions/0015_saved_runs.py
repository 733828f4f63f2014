"""What a job has saved is a blob of its tenant's like others, named by columns.

Jobs under way begin anew, to the same bytes; what lies below `training/` in the blob store is of no use any more.
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None
COLUMNS = {"saved_step": sa.Integer, "saved_name": sa.Text, "saved_sha256": sa.Text, "saved_bytes": sa.BigInteger}


def upgrade() -> None:
    op.drop_column("jobs", "saved")
    for name, kind in COLUMNS.items():
        op.add_column("jobs", sa.Column(name, kind))
    op.create_index("ix_jobs_tenant_id_saved_sha256", "jobs", ["tenant_id", "saved_sha256"])


def downgrade() -> None:
    op.drop_index("ix_jobs_tenant_id_saved_sha256", "jobs")
    for name in COLUMNS:
        op.drop_column("jobs", name)
    op.add_column("jobs", sa.Column("saved", sa.Text))
