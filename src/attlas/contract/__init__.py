"""The contract that every mechanism signs, and the reference vectors that hold it to a paper."""
