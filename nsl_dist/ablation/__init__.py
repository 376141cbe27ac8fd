"""The paper's ablations: which trainings they are made of, how these run on a cluster, what comes out."""
