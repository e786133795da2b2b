"""What models cost, and all that an evaluation found on one page."""
