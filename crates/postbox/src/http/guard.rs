//! Which addresses may be called. Whoever can set a URL must not reach with it what only this machine can reach.
//!
//! Source: the IANA registries of special-purpose addresses (IPv4 and IPv6), and the metadata services of the clouds.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Which addresses may be called.
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard {
    /// These, whatever they are.
    networks: Vec<IpNet>,
    /// One's own: loopback and private ones.
    own: bool,
}

/// An address that is not called, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) ip: IpAddr,
    what: What,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refused { ip, what } = self;
        write!(f, "the address {ip} is {}, and is not called unless it is allowed", what.words())
    }
}

impl std::error::Error for Refused {}

/// What an address is, if it is not one of the public internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Loopback,
    Private,
    Shared,
    UniqueLocal,
    LinkLocal,
    Metadata,
    Unspecified,
    Multicast,
    Documentation,
    Tunnel,
    Reserved,
}

impl What {
    fn words(self) -> &'static str {
        match self {
            What::Loopback => "this machine's own (loopback)",
            What::Private => "private",
            What::Shared => "shared by a provider's customers (CGNAT)",
            What::UniqueLocal => "private (unique local)",
            What::LinkLocal => "link-local",
            What::Metadata => "a cloud's metadata service",
            What::Unspecified => "unspecified",
            What::Multicast => "multicast",
            What::Documentation => "for documentation",
            What::Tunnel => "that of a tunnel",
            What::Reserved => "reserved",
        }
    }

    /// A part of one's own network.
    fn own(self) -> bool {
        matches!(self, What::Loopback | What::Private | What::Shared | What::UniqueLocal)
    }
}

impl Guard {
    /// One's own addresses may be called, too: loopback, private, shared and unique local ones; not link-local
    /// ones, nor metadata services.
    pub(crate) fn allow_own(&mut self) {
        self.own = true;
    }

    /// This network may be called: `10.0.0.0/8`, or one address.
    pub(crate) fn allow(&mut self, network: &str) -> Result<(), String> {
        let one = network.parse::<IpAddr>().map(IpNet::from);
        let network = one.or_else(|_| network.parse::<IpNet>()).map_err(|_| {
            format!("`{}` is no network; write it like `10.0.0.0/8` or `::1/128`", network.escape_debug())
        })?;
        self.networks.push(network);
        Ok(())
    }

    /// Whether it may be called.
    pub(crate) fn permits(&self, ip: IpAddr) -> Result<(), Refused> {
        // `::ffff:127.0.0.1` reaches 127.0.0.1.
        let canonical = ip.to_canonical();
        let Some(what) = what(canonical) else { return Ok(()) };
        let listed = self.networks.iter().any(|network| network.contains(&canonical));
        if listed || (self.own && what.own()) { Ok(()) } else { Err(Refused { ip, what }) }
    }
}

fn what(ip: IpAddr) -> Option<What> {
    match ip {
        IpAddr::V4(ip) => what_v4(ip),
        IpAddr::V6(ip) => what_v6(ip),
    }
}

fn what_v4(ip: Ipv4Addr) -> Option<What> {
    Some(match ip.octets() {
        // Most clouds; Oracle; Alibaba; Azure, whose is a public one.
        [169, 254, 169, 254] | [192, 0, 0, 192] | [100, 100, 100, 200] | [168, 63, 129, 16] => What::Metadata,
        [0, 0, 0, 0] => What::Unspecified,
        [0, ..] => What::Reserved,
        [127, ..] => What::Loopback,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => What::Private,
        [100, 64..=127, ..] => What::Shared,
        [169, 254, ..] => What::LinkLocal,
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => What::Documentation,
        // Protocol assignments, relays to 6to4, benchmarks.
        [192, 0, 0, _] | [198, 18..=19, ..] => What::Reserved,
        [192, 88, 99, _] => What::Tunnel,
        [224..=239, ..] => What::Multicast,
        [240..=255, ..] => What::Reserved,
        _ => return None,
    })
}

fn what_v6(ip: Ipv6Addr) -> Option<What> {
    let embedded = |high: u16, low: u16| what_v4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    Some(match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => What::Unspecified,
        [0, 0, 0, 0, 0, 0, 0, 1] => What::Loopback,
        // ::127.0.0.1, an old way to write an IPv4 address: nothing that is still routed.
        [0, 0, 0, 0, 0, 0, high, low] => return Some(embedded(high, low).unwrap_or(What::Reserved)),
        // NAT64 and 6to4 reach the IPv4 address that is in them.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => return embedded(high, low),
        [0x2002, high, low, ..] => return embedded(high, low),
        [0x64, 0xff9b, 1, ..] => What::Tunnel,
        // Amazon's.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => What::Metadata,
        [0xfc00..=0xfdff, ..] => What::UniqueLocal,
        [0xfe80..=0xfebf, ..] => What::LinkLocal,
        [0xff00..=0xffff, ..] => What::Multicast,
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => What::Documentation,
        // Teredo, and what else is assigned to protocols: 2001::/23.
        [0x2001, 0, ..] => What::Tunnel,
        [0x2001, 1..=0x1ff, ..] => What::Reserved,
        // ISATAP: the IPv4 address is in the second half.
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] if embedded(high, low).is_some() => What::Tunnel,
        [0x2000..=0x3fff, ..] => return None,
        // Nothing else is handed out as an address of the internet.
        _ => What::Reserved,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(guard: &Guard, ip: &str) -> bool {
        guard.permits(ip.parse().expect("an address")).is_ok()
    }

    /// What must not be reached, by what it is.
    const NOT_PUBLIC: [(&str, What); 52] = [
        ("0.0.0.0", What::Unspecified),
        ("0.1.2.3", What::Reserved),
        ("10.0.0.0", What::Private),
        ("10.255.255.255", What::Private),
        ("100.64.0.1", What::Shared),
        ("100.127.255.255", What::Shared),
        ("100.100.100.200", What::Metadata),
        ("127.0.0.1", What::Loopback),
        ("127.255.255.254", What::Loopback),
        ("169.254.0.1", What::LinkLocal),
        ("169.254.169.254", What::Metadata),
        ("168.63.129.16", What::Metadata),
        ("172.16.0.1", What::Private),
        ("172.31.255.255", What::Private),
        ("192.0.0.8", What::Reserved),
        ("192.0.0.192", What::Metadata),
        ("192.0.2.1", What::Documentation),
        ("192.88.99.1", What::Tunnel),
        ("192.168.0.1", What::Private),
        ("198.18.0.1", What::Reserved),
        ("198.19.255.255", What::Reserved),
        ("198.51.100.1", What::Documentation),
        ("203.0.113.1", What::Documentation),
        ("224.0.0.1", What::Multicast),
        ("239.255.255.255", What::Multicast),
        ("240.0.0.1", What::Reserved),
        ("255.255.255.255", What::Reserved),
        ("::", What::Unspecified),
        ("::1", What::Loopback),
        ("::127.0.0.1", What::Loopback),
        ("::8.8.8.8", What::Reserved),
        ("::ffff:127.0.0.1", What::Loopback),
        ("::ffff:10.1.2.3", What::Private),
        ("::ffff:169.254.169.254", What::Metadata),
        ("::ffff:0:127.0.0.1", What::Reserved),
        ("64:ff9b::10.0.0.1", What::Private),
        ("64:ff9b::169.254.169.254", What::Metadata),
        ("64:ff9b:1::8.8.8.8", What::Tunnel),
        ("100::1", What::Reserved),
        ("2001::1", What::Tunnel),
        ("2001:2::1", What::Reserved),
        ("2001:20::1", What::Reserved),
        ("2001:db8::1", What::Documentation),
        ("2002:7f00:1::", What::Loopback),
        ("2002:a00:1::1", What::Private),
        ("2a00::5efe:192.168.0.1", What::Tunnel),
        ("3fff:abc::1", What::Documentation),
        ("fc00::1", What::UniqueLocal),
        ("fd00:ec2::254", What::Metadata),
        ("fe80::1", What::LinkLocal),
        ("fec0::1", What::Reserved),
        ("ff02::1", What::Multicast),
    ];

    #[test]
    fn only_the_public_internet_is_called() {
        for (ip, expected) in NOT_PUBLIC {
            let parsed: IpAddr = ip.parse().expect("an address");
            assert_eq!(what(parsed.to_canonical()), Some(expected), "{ip}");
            let refused = Guard::default().permits(parsed).expect_err(ip).to_string();
            assert!(refused.contains(expected.words()), "{refused}");
        }
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.1",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2002:808:808::1",
            "2606:4700::1111",
            "2a00::5efe:8.8.8.8",
        ] {
            assert!(permits(&Guard::default(), public), "{public}");
        }
    }

    #[test]
    fn ones_own_addresses_can_be_allowed_and_no_others_with_them() {
        let mut guard = Guard::default();
        guard.allow_own();
        for (ip, what) in NOT_PUBLIC {
            let own = matches!(what, What::Loopback | What::Private | What::Shared | What::UniqueLocal);
            assert_eq!(permits(&guard, ip), own, "{ip}");
        }
    }

    #[test]
    fn networks_can_be_allowed() {
        let mut guard = Guard::default();
        for network in ["127.0.0.1/32", "10.0.0.0/8", "fd12::/16", "192.168.7.1"] {
            guard.allow(network).expect("a network");
        }
        for allowed in ["127.0.0.1", "::ffff:127.0.0.1", "10.9.8.7", "fd12::1", "192.168.7.1", "1.1.1.1"] {
            assert!(permits(&guard, allowed), "{allowed}");
        }
        for refused in ["127.0.0.2", "fd13::1", "192.168.7.2", "169.254.169.254", "::1"] {
            assert!(!permits(&guard, refused), "{refused}");
        }
        for bad in ["", "10.0.0.0/33", "localhost", "10.0.0.0/", "0x7f.1"] {
            assert!(Guard::default().allow(bad).is_err(), "{bad}");
        }
    }
}
