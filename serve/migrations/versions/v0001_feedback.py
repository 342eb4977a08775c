"""Feedback, and the answers of conversations that are kept."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this layout."""
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("conversation", sa.String(64)),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(200)),
        sa.Column("payload", sa.Text, nullable=False),
        sa.UniqueConstraint("owner", "kind", "subject", name="feedback_subject"),
    )
    op.create_index("feedback_owner", "feedback", ["owner", "created_ms"])
    op.create_index("feedback_conversation", "feedback", ["conversation"])
    op.create_table(
        "answers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("conversation", sa.String(64)),
        sa.Column("payload", sa.Text, nullable=False),
    )
    op.create_index("answers_owner", "answers", ["owner", "created_ms"])
    op.create_index("answers_conversation", "answers", ["conversation"])


def downgrade() -> None:
    """Back to the one before."""
    op.drop_table("answers")
    op.drop_table("feedback")
