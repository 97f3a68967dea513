"""Pre-training of medical vision-language models on image-report pairs."""
