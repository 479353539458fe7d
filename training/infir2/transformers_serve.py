"""`python -m infir2.transformers_serve serve FLAGS`: transformers' server with the products of infir2.cpu_kernels."""

from infir2 import cpu_kernels

if __name__ == "__main__":
    cpu_kernels.install_for_generation()
    from transformers.cli.transformers import main

    main()
