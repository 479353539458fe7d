# shellcheck shell=bash
# The precision, for every stage: training/infir2/precision.py holds the table. SCALE_FMT=pow2|fp32 is the one switch
# for the format of scales.

# use_precision NAME: set PRECISION_ARGS. An unknown name lists the known ones.
use_precision() {
    export SCALE_FMT=${SCALE_FMT:-pow2}
    read_words PRECISION_ARGS "$PYTHON" -m infir2.precision "$1"
}
