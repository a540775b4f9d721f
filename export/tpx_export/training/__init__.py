"""Fine-tuning of thinking adapters on a frozen base: docs/training.md."""
