"""`python -m bench cost`: what the layer itself costs, in time, processor time and memory."""
