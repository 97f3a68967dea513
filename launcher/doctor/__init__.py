"""What `medvlp doctor` looks at, one file a subject. Checks return findings and leave nothing behind."""
