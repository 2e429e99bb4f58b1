"""What one adapted projection costs, and the paper's Eq. 7."""
