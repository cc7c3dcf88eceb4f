// What the packages from npm say: a list of questions as JSON on stdin, their answers on stdout.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

// The packages are where the script put them.
const packages = createRequire(process.env.POSTBOX_TEST_NODE + "/");
const load = (name) => import(pathToFileURL(packages.resolve(name)));
const { Webhook } = packages("standardwebhooks");
const Stripe = (await load("stripe")).default;
const { HTTP } = packages("cloudevents");
const { sign, verify } = await import(
  pathToFileURL(`${process.env.POSTBOX_TEST_NODE}/node_modules/@octokit/webhooks-methods/dist-node/index.js`)
);
const stripe = new Stripe("sk_test_none");

const schemes = {
  standard: {
    sign: (q) => new Webhook(q.secret).sign(q.id, new Date(q.timestamp * 1000), q.body),
    verify: (q) => void new Webhook(q.secret).verify(q.body, q.headers),
  },
  github: {
    sign: (q) => sign(q.secret, q.body),
    verify: async (q) => {
      if (!(await verify(q.secret, q.body, q.headers["x-hub-signature-256"]))) throw new Error("no match");
    },
  },
  stripe: {
    sign: (q) => stripe.webhooks.generateTestHeaderString({ payload: q.body, secret: q.secret, timestamp: q.timestamp }),
    verify: (q) => void stripe.webhooks.constructEvent(q.body, q.headers["stripe-signature"], q.secret),
  },
};

async function answer(q) {
  try {
    if (q.do === "cloudevent") {
      const { data, ...attributes } = HTTP.toEvent({ headers: q.headers, body: q.body }).toJSON();
      return { attributes, data };
    }
    return (await schemes[q.scheme][q.do](q)) ?? "good";
  } catch (error) {
    return `refused: ${error.message}`;
  }
}

const questions = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(await Promise.all(questions.map(answer))));
