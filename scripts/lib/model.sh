# shellcheck shell=bash
# The model's shape. Nothing is retyped here: the flags come from the config.json of the Hugging Face folder.

# use_model NAME FOLDER: set MODEL_ARGS; refuses a folder that is not of that name's size.
use_model() {
    read_words MODEL_ARGS "$PYTHON" -m infir2.qwen2 "$2" --expect "$1"
    MODEL_ARGS+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$2")
}
