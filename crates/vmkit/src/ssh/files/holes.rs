//! Where a large file of the guest has data, so that its holes need not be read over SFTP, which
//! knows none.
//!
//! A program in the guest is asked: Perl or Python, one of which most guests have. Whatever it says
//! is checked, and where it says nothing of use the whole file is read: the copy is the same, and
//! takes longer.

use std::ops::Range;
use std::time::Duration;

use russh::ChannelMsg;
use russh::client::Handle;
use tokio::time::timeout;

use super::GuestFiles;
use crate::ssh::GuestCommand;
use crate::ssh::verifier::ServerVerifier;

/// The smallest file that is worth a program in the guest.
const LEAST_BYTES: u64 = 8 << 20;
/// How long the program may take: a loaded guest begins one within a few seconds.
const LIMIT: Duration = Duration::from_secs(20);
/// How much it may say.
const MOST_SAID_BYTES: usize = 4 << 20;
/// Which holes are too short to be worth a request of their own.
const SHORT_HOLE_BYTES: u64 = 128 << 10;
/// What begins and ends the answer.
const BEGIN: &str = "vmkit: data";
const END: &str = "vmkit: end";

/// Prints where the data of the file `$1` begins and ends, a stretch a line. A file with as many
/// blocks as it has bytes has no holes, which is told without a further program.
///
/// Source: lseek(2): 3 is `SEEK_DATA`, 4 is `SEEK_HOLE`, and error 6 (`ENXIO`) says that only a
/// hole is left.
const SCRIPT: &str = r#"
set -- "$1" $(stat -L -c '%b %B %s' -- "$1" 2>/dev/null)
if [ $# -eq 4 ] && [ $(($2 * $3)) -ge "$4" ]; then exit; fi
perl -e '
  open(my $file, "<", $ARGV[0]) or exit 1;
  print "vmkit: data\n";
  my $at = 0;
  while (defined(my $data = sysseek($file, $at, 3))) {
    defined($at = sysseek($file, $data + 0, 4)) or exit 1;
    print $data + 0, " ", $at + 0, "\n";
  }
  $! + 0 == 6 or exit 1;
  print "vmkit: end\n";
' -- "$1" 2>/dev/null || python3 -c '
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
print("vmkit: data")
at = 0
try:
    while True:
        data = os.lseek(file, at, 3)
        at = os.lseek(file, data, 4)
        print(data, at)
except OSError as error:
    if error.errno == 6:
        print("vmkit: end")
' "$1" 2>/dev/null
"#;

impl GuestFiles {
    /// Returns where a file of the guest of this length has data; `None` where that is not known.
    pub(super) async fn data_of(&self, path: &str, size: u64) -> Option<Vec<Range<u64>>> {
        if size < LEAST_BYTES {
            return None;
        }
        let connection = self.connection.upgrade()?;
        let line = GuestCommand::new(["sh", "-c", SCRIPT, "sh", path]).line().ok()??;
        let said = timeout(LIMIT, said(&connection, line)).await.ok()??;
        read(&String::from_utf8(said).ok()?, size)
    }
}

/// Runs a program in the guest without input, and returns what it printed; `None` where that is too
/// much, or the server runs nothing.
async fn said(connection: &Handle<ServerVerifier>, line: Vec<u8>) -> Option<Vec<u8>> {
    let mut channel = connection.channel_open_session().await.ok()?;
    channel.exec(true, line).await.ok()?;
    channel.eof().await.ok()?;
    let mut said = Vec::new();
    loop {
        match channel.wait().await {
            Some(ChannelMsg::Data { data }) if said.len() + data.len() <= MOST_SAID_BYTES => {
                said.extend_from_slice(&data);
            }
            Some(ChannelMsg::Data { .. } | ChannelMsg::Failure) => return None,
            Some(ChannelMsg::Close) | None => return Some(said),
            Some(_) => {}
        }
    }
}

/// Reads what the program printed, with short holes taken for data; `None` for what makes no sense.
///
/// What the guest's shell prints before is no part of it, and what one program began is none where
/// another one ended it.
fn read(said: &str, size: u64) -> Option<Vec<Range<u64>>> {
    let (said, _) = said.rsplit_once(END)?;
    let (_, said) = said.rsplit_once(BEGIN)?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut last = 0;
    for line in said.lines().filter(|line| !line.trim().is_empty()) {
        let (begin, end) = line.split_once(' ')?;
        let (begin, end) = (begin.parse::<u64>().ok()?, end.trim().parse::<u64>().ok()?);
        if begin < last || end <= begin {
            return None;
        }
        last = end;
        // The file may have grown meanwhile, and what is beyond is read as it comes.
        let (begin, end) = (begin.min(size), end.min(size));
        match found.last_mut() {
            Some(before) if begin - before.end < SHORT_HOLE_BYTES => before.end = end,
            _ if begin < end => found.push(begin..end),
            _ => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command as Program;

    use super::*;

    const SIZE: u64 = 100 << 20;

    fn answer(lines: &str) -> Option<Vec<Range<u64>>> {
        read(&format!("WELCOME\n{BEGIN}\n{lines}{END}\n"), SIZE)
    }

    #[test]
    fn senseless_replies_are_not_believed() {
        let one = |range: Range<u64>| Some(std::iter::once(range).collect::<Vec<_>>());
        assert_eq!(answer("0 4096\n8388608 8392704\n"), Some(vec![0..4096, 8_388_608..8_392_704]));
        assert_eq!(answer("0 4096\n8192 12288\n"), one(0..12288), "a short hole is read");
        assert_eq!(answer(""), Some(vec![]), "there is nothing but a hole");
        assert_eq!(answer("0 999999999999\n"), one(0..SIZE));
        for lines in ["0\n", "0 x\n", "-1 5\n", "5 5\n", "9 5\n", "8388608 8392704\n0 4096\n", "0 5 6\n"] {
            assert_eq!(answer(lines), None, "{lines:?}");
        }
        for said in ["", "WELCOME", "vmkit: data\n0 4096\n", "0 4096\nvmkit: end\n"] {
            assert_eq!(read(said, SIZE), None, "{said:?}");
        }
        // Perl began and failed, and then Python did it.
        let both = format!("{BEGIN}\n0 10\n{BEGIN}\n0 20\n{END}\n");
        assert_eq!(read(&both, SIZE), one(0..20));
    }

    #[test]
    fn perl_and_python_find_the_holes_of_a_file_and_a_full_one_needs_neither() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("-a 'file'\n");
        let file = std::fs::File::create(&path).unwrap();
        file.write_all_at(&[7; 8192], 50 << 20).unwrap();
        file.set_len(SIZE).unwrap();
        let without = |name: &str| SCRIPT.replace(&format!("{name} -"), "false -");
        let run = |script: &str| {
            let mut program = Program::new("sh");
            program.current_dir(dir.path()).args(["-c", script, "sh", "-a 'file'\n"]);
            let output = program.output().unwrap();
            read(&String::from_utf8(output.stdout).unwrap(), SIZE)
        };
        let expected = Some(std::iter::once(50 << 20..(50 << 20) + 8192).collect());
        for program in ["perl", "python3"] {
            let other = if program == "perl" { "python3" } else { "perl" };
            if Program::new(program).arg("-V").output().is_ok() {
                assert_eq!(run(&without(other)), expected, "{program}");
            }
        }
        assert_eq!(run(&without("perl").replace("python3 -", "false -")), None);
        std::fs::write(&path, [7; 8192]).unwrap();
        assert_eq!(run(SCRIPT), None);
    }
}
