//! What all sockets of the guest may have of its memory. The kernel takes parts of what there is when it boots and never
//! looks again: a guest that has grown would be short of buffers with all its memory free.
use std::fs;

/// In pages: below the first number nothing is done, from the second one on buffers shrink, the third is the end.
type Limits = [u64; 3];

/// `/proc/sys/net/ipv4/tcp_mem`, or `udp_mem`.
#[derive(Debug)]
pub struct Sockets {
    path: &'static str,
    /// The kernel's middle number is this part of the memory (`tcp_init_mem` and `udp_init` of Linux).
    part: u64,
    own: Option<Own>,
}

/// What is in force while nobody else has set something.
#[derive(Clone, Copy, Debug)]
struct Own {
    /// The middle number of the guest as it was started.
    built: u64,
    written: Limits,
}

const PAGE: u64 = 4096;
/// The kernel leaves out what it keeps free, and what it did not have yet: a number that is further off than this part is
/// not its own.
const SLACK: u64 = 6;

impl Sockets {
    /// Of TCP and UDP.
    pub fn all() -> [Self; 2] {
        let of = |path, part| Self {
            path,
            part,
            own: None,
        };
        [
            of("/proc/sys/net/ipv4/tcp_mem", 16),
            of("/proc/sys/net/ipv4/udp_mem", 8),
        ]
    }

    /// The guest was started with `built` bytes and has `now`: the limits are what its kernel would have for that, unless a
    /// container or the pod has set others.
    pub fn follow(&mut self, built: u64, now: u64) {
        let Some(current) = fs::read_to_string(self.path).ok().and_then(|t| parse(&t)) else {
            return;
        };
        let Some(wanted) = self.wanted(current, built, now) else {
            return;
        };
        let [low, pressure, high] = wanted;
        let text = format!("{low} {pressure} {high}");
        if wanted != current && fs::write(self.path, text).is_err() {
            return;
        }
        if let Some(own) = &mut self.own {
            own.written = wanted;
        }
    }

    fn wanted(&mut self, current: Limits, built: u64, now: u64) -> Option<Limits> {
        let own = match self.own {
            Some(own) => own,
            None => Own {
                built: self.of_kernel(current, built)?,
                written: current,
            },
        };
        self.own = Some(own);
        if current != own.written {
            return None;
        }
        let scaled = u128::from(own.built) * u128::from(now) / u128::from(built.max(1));
        Some(limits(u64::try_from(scaled).ok()?))
    }

    /// The middle number, if these are the kernel's own for a guest of this size.
    fn of_kernel(&self, current: Limits, built: u64) -> Option<u64> {
        let [_, pressure, _] = current;
        let expected = built / PAGE / self.part;
        let is_near = pressure.abs_diff(expected) <= expected / SLACK;
        (current == limits(pressure) && is_near).then_some(pressure)
    }
}

/// The kernel's three of its middle one.
fn limits(pressure: u64) -> Limits {
    let low = pressure / 4 * 3;
    [low, pressure, low * 2]
}

fn parse(text: &str) -> Option<Limits> {
    let numbers: Vec<u64> = text
        .split_ascii_whitespace()
        .map(|number| number.parse().ok())
        .collect::<Option<_>>()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    /// About what Linux reckons for a guest of 256 MiB, of which it manages 238.
    const BOOTED: &str = "2787\t3716\t5574\n";

    #[test]
    fn the_kernels_own_limits_follow_the_memory_up_and_down() {
        let [mut tcp, mut udp] = Sockets::all();
        let booted = parse(BOOTED).unwrap();
        let built = 238 * MIB;
        let grown = tcp.wanted(booted, built, 16 * built).unwrap();
        assert_eq!(grown, limits(16 * 3716));
        tcp.own.as_mut().unwrap().written = grown;
        assert_eq!(tcp.wanted(grown, built, built), Some(booted));
        let twice = limits(2 * 3716);
        assert_eq!(udp.wanted(twice, built, 2 * built), Some(limits(4 * 3716)));
    }

    #[test]
    fn limits_that_somebody_has_set_stay() {
        let built = 238 * MIB;
        for set in ["3000 4000 6001", "30000 40000 60000", "0 0 0"] {
            let [mut tcp, _] = Sockets::all();
            assert_eq!(
                tcp.wanted(parse(set).unwrap(), built, 2 * built),
                None,
                "{set}"
            );
        }
        // Also after they have followed once, and for as long as they are set.
        let [mut tcp, _] = Sockets::all();
        let booted = parse(BOOTED).unwrap();
        let grown = tcp.wanted(booted, built, 2 * built).unwrap();
        tcp.own.as_mut().unwrap().written = grown;
        let set = [1, 2, 3];
        assert_eq!(tcp.wanted(set, built, 4 * built), None);
        assert_eq!(tcp.wanted(grown, built, built), Some(booted));
    }

    #[test]
    fn what_is_no_three_numbers_is_left_alone() {
        for text in ["", "1 2", "1 2 3 4", "a b c"] {
            assert_eq!(parse(text), None);
        }
    }
}
