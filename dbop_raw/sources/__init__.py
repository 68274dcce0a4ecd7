"""Where items come from: files opened by their ending, and what is read out of them."""
