"""What is kept of one prompt, as a page and as a picture."""
