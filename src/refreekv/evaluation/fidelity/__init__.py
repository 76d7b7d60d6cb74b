"""Fidelity to the full cache's own answer: many policies on one prefill."""
