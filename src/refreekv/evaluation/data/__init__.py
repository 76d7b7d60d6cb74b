"""What is measured on: public datasets and generated prompts, by name."""
