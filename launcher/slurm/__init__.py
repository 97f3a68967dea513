"""Jobs on a Slurm cluster: site settings, job scripts, submitting, and what follows when a job ends."""
