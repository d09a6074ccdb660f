# Sourced by scripts that run experiments in stages.

# stage FOLDER NAME COMMAND...: run the command once; its marker in FOLDER/done holds the command, for the report.
stage() {
  local done_folder=$1/done name=$2 start=$SECONDS
  shift 2
  mkdir -p "$done_folder"
  if [ -e "$done_folder/$name" ]; then echo "== $name: done before"; return; fi
  echo "== $name"
  "$@"
  { echo "# $name: $((SECONDS - start)) s"; printf '%q ' "$@"; echo; } > "$done_folder/$name.unfinished"
  mv "$done_folder/$name.unfinished" "$done_folder/$name"
  echo "== $name: $((SECONDS - start)) s"
}

# commands_of FOLDER: the commands of its finished stages, in order.
commands_of() { (cd "$1/done" && ls -tr | xargs cat); }
