"""What happens around the loop: learning-rate schedule, checkpoints, the run's log."""
