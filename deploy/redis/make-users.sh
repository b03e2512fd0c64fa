#!/bin/sh
# Gives each user of users.acl a random password: make-users.sh FOLDER HOST:PORT
# Writes FOLDER/users.acl, which Redis loads (aclfile), and FOLDER/redis-url-<user>, for REDIS_URL_FILE of a process.
# Only its owner may enter the folder. The files in it can be read by all: containers run as other users.
set -eu
folder=${1:?the folder for the files} address=${2:?the host and port of Redis}
users=$(dirname "$0")/users.acl
mkdir -p "$folder"
chmod 700 "$folder"
if [ -e "$folder/users.acl" ]; then
  echo "$folder/users.acl exists: to change a password, see deploy/secrets.md" >&2
  exit 1
fi
while read -r user name on _ rules; do
  password=$(openssl rand -hex 32)
  hash=$(printf %s "$password" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
  echo "redis://$name:$password@$address/0" > "$folder/redis-url-$name"
  echo "$user $name $on #$hash $rules"
done < "$users" > "$folder/users.acl"
chmod 644 "$folder"/users.acl "$folder"/redis-url-*
