using System.Collections.Generic;
using System.Linq;
using System.Xml.Linq;

namespace Safelight
{
    /// <summary>A model that the server offers.</summary>
    public sealed class Model
    {
        internal Model(XElement message)
        {
            Name = Json.Text(message, "name");
            Revision = Json.Text(message, "revision");
            Description = Json.Text(message, "description");
            License = Json.Text(message, "license");
            IsDefault = Json.Text(message, "isDefault") == "true";
        }

        /// <summary>The model's name, "models/NAME".</summary>
        public string Name { get; }

        public string Revision { get; }
        public string Description { get; }
        public string License { get; }
        public bool IsDefault { get; }
    }

    /// <summary>The present state of an output.</summary>
    public sealed class OutputState
    {
        internal OutputState(XElement message)
        {
            OutputIndex = (int)Json.Number(message, "outputIndex");
            Step = (int)Json.Number(message, "step");
            NumSteps = (int)Json.Number(message, "numSteps");
        }

        public int OutputIndex { get; }
        public int Step { get; }
        public int NumSteps { get; }
    }

    /// <summary>The present state of a generation.</summary>
    public sealed class GenerationInfo
    {
        internal GenerationInfo(string json)
        {
            XElement message = Safelight.Json.Parse(json);
            Json = json;
            Name = Safelight.Json.Text(message, "name");
            State = Safelight.Json.Text(message, "state");
            Outputs = message.Elements("outputs").Elements("item").Select(output => new OutputState(output)).ToList();
        }

        /// <summary>The generation's name, "generations/ID".</summary>
        public string Name { get; }

        /// <summary>The state's name in the API, such as "STATE_CANCELLED".</summary>
        public string State { get; }

        public IReadOnlyList<OutputState> Outputs { get; }

        /// <summary>The whole Generation message as JSON.</summary>
        public string Json { get; }
    }
}
