# Sourced by scripts that run experiments in stages.

# stage FOLDER NAME COMMAND...: run the command once; its marker in FOLDER/done holds the command, for the report. Where
# stage_log is set, what the command prints goes into that file.
stage() {
  local done_folder=$1/done name=$2 start=$SECONDS
  shift 2
  mkdir -p "$done_folder"
  if [ -e "$done_folder/$name" ]; then echo "== $name: done before"; return; fi
  echo "== $name"
  if [ -n "${stage_log:-}" ]; then in_log "$name" "$@"; else "$@"; fi
  { echo "# $name: $((SECONDS - start)) s"; printf '%q ' "$@"; echo; } > "$done_folder/$name.unfinished"
  mv "$done_folder/$name.unfinished" "$done_folder/$name"
  echo "== $name: $((SECONDS - start)) s"
}

# in_log NAME COMMAND...: of a command that fails, but not by ctrl-C, the last line is shown.
in_log() {
  local name=$1 status=0
  shift
  "$@" >> "$stage_log" 2>&1 || status=$?
  if [ $status != 0 ] && [ $status != 130 ]; then echo "error: $name failed: $(tail -n 1 "$stage_log")" >&2; fi
  return $status
}

# commands_of FOLDER: the commands of its finished stages, in order.
commands_of() { (cd "$1/done" && ls -tr | xargs cat); }
