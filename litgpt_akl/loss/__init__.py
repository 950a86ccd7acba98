"""What is minimised: divergences of two distributions, and their loss over both LM heads."""
