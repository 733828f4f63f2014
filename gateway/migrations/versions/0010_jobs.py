"""Fine-tuning jobs: the queue, what jobs tell, their checkpoints, what tenants' jobs have been given."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_jobs()
    op.create_table(
        "job_metadata",
        _job("fk_job_metadata_job_id"),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "job_events",
        _job("fk_job_events_job_id"),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.Text),
    )
    op.create_table(
        "job_checkpoints",
        _job("fk_job_checkpoints_job_id"),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("version_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_job_checkpoints_version_id", "job_checkpoints", ["version_id"])
    op.create_table(
        "training_accounts",
        sa.Column("tenant_id", sa.Text, primary_key=True),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("most_running", sa.BigInteger),
        sa.Column("served", sa.Double, nullable=False),
    )


def create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("wish", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("base_fingerprint", sa.Text, nullable=False),
        sa.Column("warm_start", sa.Text),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("training_file", sa.Text, nullable=False),
        sa.Column("validation_file", sa.Text),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("suffix", sa.Text),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("hyperparameters", sa.Text, nullable=False),
        sa.Column("tailor", sa.Text, nullable=False),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("quota", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", sa.BigInteger),
        sa.Column("losses", sa.Integer, nullable=False),
        sa.Column("queued_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("estimated_finish", sa.BigInteger),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("total_steps", sa.Integer),
        sa.Column("trained_tokens", sa.BigInteger, nullable=False),
        sa.Column("saved", sa.Text),
        sa.Column("version_id", sa.Text),
        sa.Column("fine_tuned_model", sa.Text),
        sa.Column("result_files", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("last_event", sa.Integer, nullable=False),
    )
    op.create_index("ix_jobs_tenant_id_id", "jobs", ["tenant_id", "id"])
    op.create_index("ix_jobs_status", "jobs", ["status"])


def _job(name: str) -> sa.Column[str]:
    return sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", name=name), primary_key=True)


def downgrade() -> None:
    for table in ("training_accounts", "job_checkpoints", "job_events", "job_metadata", "jobs"):
        op.drop_table(table)
