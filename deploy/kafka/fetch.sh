#!/bin/sh
# Fetches the jars of one Apache Kafka broker from Maven Central into ${SLUICE_CACHE:-~/.cache/sluice}/kafka/libs.
# Needs mvn and a JDK 17 or later (Debian: apt-get install maven default-jre-headless). Does nothing when they are there.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
target="${SLUICE_CACHE:-$HOME/.cache/sluice}/kafka"
stamp="$target/pom.xml" # written last: its presence and content say that the jars are complete and of this version

if cmp -s "$here/pom.xml" "$stamp"; then
    echo "Apache Kafka is in $target/libs"
    exit 0
fi
command -v mvn >/dev/null || { echo "fetch.sh: mvn is missing: apt-get install maven" >&2; exit 1; }

mkdir -p "$target"
rm -rf "$target/libs" "$stamp"
mvn --batch-mode --quiet --strict-checksums --file "$here/pom.xml" \
    dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$target/libs"
cp "$here/pom.xml" "$stamp"
echo "Apache Kafka is in $target/libs"
