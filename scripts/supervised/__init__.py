"""K-FAC against SGD and Adam on supervised problems, each tuned on the same budget."""
